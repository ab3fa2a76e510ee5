"""From files to a prepared scan: find cases, read NIfTI and DICOM, check, strip, register, scale.

`find` gives cases, by the folder layouts in `layouts`; `prepare` and `volume` give what a model
sees. Nothing here knows a model.
"""
