"""Where a step's time and memory go: spans on every rank, what they add up to, and the page that shows them."""
