"""What `surgeon demo` works on: a small network, its weights, and some Fashion-MNIST images."""
