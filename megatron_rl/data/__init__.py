"""The problems of a run: files and their rows, the countdown game, tokenizers, and the order of the prompts."""
