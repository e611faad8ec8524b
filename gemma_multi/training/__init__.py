"""Fine-tuning: one run over two engines, through the grid that ships. Begin at `finetune`."""
