"""The cheapest setting per layer and noise level within a budget: `diffattn.tune`."""
