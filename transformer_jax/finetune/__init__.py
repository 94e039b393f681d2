"""Fine-tuning: which parameters train (`select`)."""
