"""LoraRetriever: retrieve the LoRA adapters that fit each prompt, compose them, answer mixed prompts in one batch."""

__version__ = "0.1.0"
