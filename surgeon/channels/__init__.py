"""Which axes of which tensors of a network share one order of channels, and how that order is changed exactly."""
