"""An unknown name is answered by the setting that the field calls so, or by the word that there is none."""

import pytest

from training.cli import main
from training.errors import UserError
from training.run.config import KEYS
from training.run.settings import load_settings, parse_train_args
from training.suggest import ABSENT, SYNONYMS, UNITS, suggestion

FLAGS = {
    "--lr": "did you mean --hyper.lr?",
    "--learning-rate": "did you mean --hyper.lr?",
    "--learning_rate": "did you mean --hyper.lr?",
    "--hyper.learning-rate": "did you mean --hyper.lr?",
    "--warmup": "did you mean --hyper.warmup-steps?",
    "--hyper.warmup": "did you mean --hyper.warmup-steps?",
    "--balance-weight": "did you mean --hyper.balance-weight?",
    "--blance-weight": "did you mean --hyper.balance-weight?",
    "--num-experts": "did you mean --model.num-experts?",
    "--hidden-size": "did you mean --model.hidden-size?",
    "--max-steps": "did you mean --steps?",
    "--epochs": "did you mean --steps?",
    "--seq-len": "did you mean --sequence-length?",
    "--bs": "did you mean --batch-size?",
    "--top-k": "did you mean --model.num-experts-per-tok?",
    "--output-dir": "did you mean --out?",
    "--dropout": "there is none",
    "--hyper.dropout": "there is none",
    "--wandb": "there is none",
    "--hyper.learnin-rate": "did you mean --hyper.lr?",
    "--lerning-rate": "did you mean --hyper.lr?",
    "--learningrate": "did you mean --hyper.lr?",
    "--warmup-ratio": "did you mean --hyper.warmup-steps? It is in steps, not a share of them",
    "--warmup-raito": "did you mean --hyper.warmup-steps? It is in steps, not a share of them",
    "--num-epochs": "did you mean --steps? It is in batches, not passes over the text",
    "--min-lr": "did you mean --hyper.min-lr-ratio? It is a share of the peak",
    "--batchsize": "did you mean --batch-size?",
    "--grad-clp": "did you mean --hyper.max-grad-norm?",
    "--momentun": "did you mean --hyper.beta1?",
    "--max-lenght": "did you mean --sequence-length?",
    "--droput": "there is none: the model has no dropout",
    "--modle.hidden-size": "did you mean --model.hidden-size?",
    "--hlep": "did you mean --help?",
    "--zzzzzzz": "`tiny-onn train --help` lists them all",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_an_unknown_flag_of_train_is_answered_by_the_one_that_is_meant(flag: str) -> None:
    with pytest.raises(UserError) as error:
        parse_train_args([flag, "3"])
    assert f"{flag}: unknown flag" in str(error.value)
    assert FLAGS[flag] in str(error.value)


def test_a_key_of_a_file_or_a_study_gets_the_same_answer() -> None:
    with pytest.raises(UserError, match=r"learning_rate: unknown key, did you mean hyper\.lr\?"):
        load_settings(None, {"learning_rate": 1e-3})
    with pytest.raises(UserError, match=r"hyper\.total_steps: unknown key, did you mean steps\?"):
        load_settings(None, {"hyper.total_steps": 1})


def test_every_synonym_leads_to_a_setting_and_is_none_itself() -> None:
    ends = {key.rpartition(".")[2] for key in KEYS}
    assert set(SYNONYMS.values()) <= KEYS.keys()
    assert not (SYNONYMS.keys() | ABSENT.keys()) & ends
    assert UNITS.keys() <= SYNONYMS.keys()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["generate", "run", "--max-new-tokens", "5"], "did you mean --tokens?"),
        (["generate", "run", "--max-tokens=5"], "did you mean --tokens?"),
        (["generate", "run", "--temprature", "1"], "did you mean --temperature?"),
        (["generate", "run", "--n", "3"], "did you mean --num-samples?"),
        (["evaluate", "run", "--dta", "x"], "did you mean --data?"),
        (
            ["surgery", "model", "--out", "x", "--num-experts", "2", "--top-k", "1"],
            "did you mean --num-experts-per-tok?",
        ),
        (["generate", "run", "--max-new-tokns", "5"], "did you mean --tokens?"),
        (["sampel"], "did you mean generate?"),
        (["trian"], "did you mean train?"),
        (["eval", "run"], "did you mean evaluate?"),
        (["sample", "run"], "did you mean generate?"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_other_verbs_and_their_flags_are_answered_too(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert meant in said
    assert said.count("\n") == 1


def test_a_name_near_nothing_gets_no_suggestion() -> None:
    assert suggestion("qqqq", ["steps", "hyper.lr"]) is None
