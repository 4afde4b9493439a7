"""A Hub Space that shows detectors side by side. Put this folder into a Space of the kind gradio."""

import os

from crosskd_hf.studies.show import show

# Hub ids or folders, with blanks between them: a variable of the Space, or written here.
show(os.environ.get("MODELS", "").split(), host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
