"""Profiles of a step's time and memory: spans on every rank, what they add up to, and the page that shows them."""
