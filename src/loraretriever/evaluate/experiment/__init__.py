"""The paper's experiment: answers to a mixed stream of prompts, by many ways to choose and compose adapters."""
