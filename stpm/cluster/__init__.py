"""The connection to Ray, and what a cluster's nodes can do."""
