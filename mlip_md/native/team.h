// Work shared among the caller and threads of XLA's pool.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace mlip_md {

class Team {
 public:
  Team(xla::ffi::ThreadPool pool, int64_t threads)
      : pool_(pool), threads_(threads > 0 ? threads : pool.num_threads()) {
    if (threads_ < 1) threads_ = 1;
  }

  int64_t threads() const { return threads_; }
  void stay_alone() { threads_ = 1; }

  // Calls work(claim) in the caller and in helpers; claim() hands out 0 … tasks-1, then -1. Which
  // thread does a task must not matter to its result. Helpers that start late find nothing to do,
  // so that nobody ever waits for a thread that may not come. What work throws is thrown here.
  template <class Work>
  void run(int64_t tasks, const Work& work) {
    if (tasks <= 0) return;
    const int64_t helpers = (tasks < threads_ ? tasks : threads_) - 1;
    if (helpers == 0) {
      int64_t next = 0;
      work([&] { return next < tasks ? next++ : -1; });
      return;
    }
    auto job = std::make_shared<Job>();
    job->tasks = tasks;
    job->work = [&work](Job& own) { work([&own] { return own.claim(); }); };
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule([job] { job->help(); });
    job->help();
    job->wait();
  }

 private:
  // Helpers count themselves in before they claim; the caller waits until all of them are out and
  // lets none in after that.
  struct Job {
    int64_t tasks;
    std::function<void(Job&)> work;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable empty;
    int64_t inside = 0;
    bool closed = false;
    std::exception_ptr error;

    int64_t claim() {
      const int64_t task = next.fetch_add(1);
      return task < tasks ? task : -1;
    }

    void help() {
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (closed) return;
        ++inside;
      }
      std::exception_ptr thrown;
      try {
        work(*this);
      } catch (...) {
        thrown = std::current_exception();
        next.store(tasks);
      }
      std::lock_guard<std::mutex> lock(mutex);
      if (thrown) error = thrown;
      if (--inside == 0) empty.notify_all();
    }

    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      closed = true;  // the caller's own claims have ended: nothing is left to hand out
      empty.wait(lock, [this] { return inside == 0; });
      if (error) std::rethrow_exception(error);
    }
  };

  xla::ffi::ThreadPool pool_;
  int64_t threads_;
};

}  // namespace mlip_md
