"""The connection to Ray, and the nodes of a cluster."""
