"""Videos, images and captions: clips and their index, buckets, crops, tar shards, generated clips."""
