"""Times of every op beside eager PyTorch, torch.compile and the libraries people use now."""
