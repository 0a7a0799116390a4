"""What `surgeon demo` works on: a small network, its weights, and a handful of Fashion-MNIST images."""
