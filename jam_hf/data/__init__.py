"""Documents on their way to a model: files read, documents turned into ids, masked (CM3) and put into batches."""
