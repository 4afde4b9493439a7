"""The trainers, and what a run needs: evaluation, saving, logs."""
