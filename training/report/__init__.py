"""Pictures and pages from records and results: values in, values out."""
