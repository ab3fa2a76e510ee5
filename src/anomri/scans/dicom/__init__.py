"""DICOM: which files form a series, which channel a series is, its conversion to NIfTI, and the mask as DICOM SEG."""
