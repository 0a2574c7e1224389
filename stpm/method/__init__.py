"""The method, without Ray: tensor functions, teachers' weights, the recipe."""
