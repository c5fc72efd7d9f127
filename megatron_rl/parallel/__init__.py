"""Every collective of the trainer."""
