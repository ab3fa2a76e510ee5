"""DICOM in and out: find the series of a folder and their channels, convert them, write a mask as SEG."""
