"""What is done with weight files: conversion, averages, publication, installation, the list of networks."""
