"""Drive a Pruner from the training loops of other libraries."""
