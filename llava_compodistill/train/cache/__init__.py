"""What a teacher gives for every sample of a data set, made once (`llava-compodistill cache`) and trained from without
the teacher in memory (`--teacher_cache`)."""
