"""Pure losses: nats per token, no mask, no reduction. `combine` is the one place that masks and sums."""
