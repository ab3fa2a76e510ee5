"""DICOM in and out: find series and their channels, convert them, write a mask as SEG."""
