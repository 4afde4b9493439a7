"""`python -m crosskd_hf COMMAND ...` is `crosskd COMMAND ...`, also for `accelerate launch -m crosskd_hf`."""

from .commands.main import main

if __name__ == "__main__":
    main()
