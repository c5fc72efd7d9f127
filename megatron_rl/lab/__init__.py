"""The entropy lab: methods compared on one frozen batch, without training each."""
