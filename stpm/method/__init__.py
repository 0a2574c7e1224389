"""The method as pure tensor functions: preprocessing, backbones, matching, memory bank, fusion, calibration."""
