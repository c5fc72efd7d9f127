"""Hugging Face weights to Megatron's and back."""
