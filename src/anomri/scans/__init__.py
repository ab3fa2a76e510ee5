"""From files to a prepared scan: find cases, read NIfTI and DICOM, check headers and masks, strip, register, scale.

`find.find_cases` gives cases, `prepare.prepare` and `volume.Volume` what a model sees. Nothing here knows a model.
"""
