"""What is compared with this project: loaders and writers of other projects, imported only when they are asked for."""
