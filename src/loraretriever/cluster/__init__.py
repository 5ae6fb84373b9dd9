"""The server on a Ray cluster: one or more ingresses that route and compose, and replicas of the engine behind them."""
