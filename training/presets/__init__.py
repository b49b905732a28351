"""Settings files that ship with the package: `--config small`, `tiny-onn study routers`."""
