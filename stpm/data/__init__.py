"""Images and data sets: decoding, the MVTec AD layout, the demo set."""
