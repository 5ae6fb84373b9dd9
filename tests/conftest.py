"""Settings for all tests."""

import os

# Before any library of Hugging Face is imported: tests read standard error, and need no network.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
