"""What methods are made of: updates, ridges, low-rank solutions, predicted gains, and one closed form a kind."""
