"""What happens to an image: fetch and decode, score, write its heatmap."""
