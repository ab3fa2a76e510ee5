"""The machine: processes that share a job, devices, threads, memory and requests to stop.

It knows nothing of scans or models; every other package may use it.
"""
