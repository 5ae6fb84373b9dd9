"""Settings for all tests."""

import os

# Before any library of Hugging Face is imported: tests read standard error, and need no network.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and costs much where others use the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
