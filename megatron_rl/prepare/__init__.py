"""Problem sets: from Hugging Face, JSON lines or Parquet to clean JSON lines for training and evaluation.

`megatron-rl data prepare` and `inspect`; nothing here imports torch.
"""
