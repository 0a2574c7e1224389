"""Nights of a production line: has a category changed since its model was fitted?"""
