"""Images and labels: splits (`datasets`), their sources (`shapes`, `folder`), augmentation and batches."""
