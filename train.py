"""Thin launcher: `accelerate launch train.py recipes/NAME.yaml [section.key=value ...] [--dry-run]`."""

from crosskd_hf.commands.train import main

if __name__ == "__main__":
    main()
