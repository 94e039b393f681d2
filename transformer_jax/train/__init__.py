"""Training: `optim` (schedules, AdamW), `step` (the pure step), `loop` (fit) and `checkpoint`."""
