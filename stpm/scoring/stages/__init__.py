"""The stages that an image goes through: fetch and decode, score, draw its heatmap, write its row."""
