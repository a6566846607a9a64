"""Token trees and drafts."""
