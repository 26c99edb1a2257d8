"""What every training run needs and no model defines: configuration, run directories, clips, video files."""
