"""An exported folder under lm_eval: bits per byte of a local text, by the harness's `hf` model; no network.

    pip install lm_eval accelerate -c constraints.txt
    python benchmarks/experiments/lm_eval_smoke.py EXPORTED --text FILE

It needs lm_eval, transformers and torch alone. The task is a YAML and a JSON lines file that this script writes: one
document, `loglikelihood_rolling`, which scores each token once, in windows of the model's context. `tiny-onn evaluate
RUN --data FILE --all` gives every token but the first ones half a window of context, so its score is a little lower.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

TASK = """task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: byte_perplexity}
"""


def main() -> None:
    """Write the task, run the harness, print its two numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what `tiny-onn export` wrote")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as home:
        data = Path(home, "text.jsonl")
        data.write_text(json.dumps({"text": args.text.read_text(encoding="utf-8")}) + "\n", encoding="utf-8")
        Path(home, "local_text.yaml").write_text(TASK % json.dumps(str(data)), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": args.folder, "dtype": "float32"}, tasks=["local_text"], device="cpu",
            batch_size=8, task_manager=TaskManager(include_path=home, include_defaults=False), bootstrap_iters=0,
        )  # fmt: skip
    scores = found["results"]["local_text"]
    print(f"lm_eval {lm_eval.__version__}: {scores['bits_per_byte,none']:.4f} bits per byte")
    print(f"byte perplexity {scores['byte_perplexity,none']:.4f}")


if __name__ == "__main__":
    main()
