"""A Hub Space that shows detectors side by side. Put this folder into a Space of the kind gradio."""

import os

from crosskd_hf.studies.show import build_page

# Hub ids or folders, with blanks between them: a variable of the Space, or written here.
build_page(os.environ.get("MODELS", "").split()).launch()
